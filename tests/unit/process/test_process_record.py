import io
import json

from helixflow.process.record import RecordLog


def test_json_has_the_fields_of_the_other_services() -> None:
    out = io.StringIO()
    RecordLog(out, level="info", format="json", service="launcher", now=lambda: 0.0).warning("engine.exited", status=-9)
    assert json.loads(out.getvalue()) == {
        "event": "engine.exited",
        "level": "warning",
        "timestamp": "1970-01-01T00:00:00Z",
        "service": "launcher",
        "status": -9,
    }


def test_text_is_one_line_whatever_the_value() -> None:
    out = io.StringIO()
    RecordLog(out, level="info", format="text", service="launcher").error("engine.output", line="two\nlines \x1b[31m")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_lower_levels_are_left_out() -> None:
    out = io.StringIO()
    RecordLog(out, level="warning", format="auto", service="launcher").info("launcher.stopped")
    assert out.getvalue() == ""


def test_a_stream_that_takes_nothing_stops_nobody() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left on device")

    log = RecordLog(Full(), level="info", format="json", service="launcher")
    log.info("launcher.stopped")
    assert not log._text
