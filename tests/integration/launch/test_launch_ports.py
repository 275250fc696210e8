import socket

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.ports import base_url, open_listeners
from helixflow.settings.tree import GatewaySettings


def test_both_listeners_say_where_clients_on_this_machine_reach_them() -> None:
    listeners = open_listeners(GatewaySettings(http_port=0, https_port=0, https_host="0.0.0.0"))
    with listeners.http, listeners.https:
        assert base_url(listeners.http) == f"http://127.0.0.1:{listeners.http.getsockname()[1]}"
        assert base_url(listeners.https, "https") == f"https://127.0.0.1:{listeners.https.getsockname()[1]}"


def test_a_busy_https_port_is_named_and_the_other_one_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        busy, http_port = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        with pytest.raises(UserError, match=r"gateway\.https_port") as caught:
            open_listeners(GatewaySettings(http_port=http_port, https_port=busy))
        assert caught.value.exit_code is ExitCode.PORT_BUSY
        assert str(busy) in caught.value.message
        socket.create_server(("127.0.0.1", http_port)).close()


def test_an_address_of_another_machine_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(UserError, match=r"gateway\.https_host") as caught:
        open_listeners(GatewaySettings(http_port=0, https_port=0, https_host="192.0.2.1"))
    assert caught.value.exit_code is ExitCode.CONFIG
