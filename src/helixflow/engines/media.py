"""Images, sounds and files in requests to engines of our own."""

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams, ImagePart


def check_media(params: ChatParams) -> None:
    """Raises `HelixError` UNSUPPORTED for media by address: the engine would fetch it, from inside our network."""
    for index, message in enumerate(params.messages):
        content = message.content
        if isinstance(content, list):
            for position, part in enumerate(content):
                if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:"):
                    raise HelixError(
                        ErrorKind.UNSUPPORTED,
                        "This model takes images as 'data:' URLs only; send the image itself, base64-encoded.",
                        param=f"messages[{index}].content[{position}].image_url",
                    )
