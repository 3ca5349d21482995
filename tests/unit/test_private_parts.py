"""What Baton uses of libraries beyond their public interface is there, and as it was.

pyproject.toml bounds these libraries. Who raises a bound reads what a failing line here names.
"""

import inspect
import tomllib
from pathlib import Path

import pytest
import uvicorn
from nats.aio import client as nats_client
from nats.aio import transport as nats_transport
from nats.aio.subscription import Subscription
from packaging.requirements import Requirement
from packaging.version import Version
from uvicorn.protocols.http import flow_control, httptools_impl

ROOT = Path(__file__).parents[2]
PARTS = [
    # answer/connection.py: uvicorn's protocol, and the state in which its own `send` leaves an answer
    (
        httptools_impl.HttpToolsProtocol,
        (
            "connection_made connection_lost data_received on_message_begin on_header on_headers_complete on_body"
            " on_message_complete on_response_complete timeout_keep_alive_handler _start_asgi_task"
            " _unset_keepalive_if_required _should_upgrade pause_writing resume_writing shutdown"
        ),
    ),
    (
        httptools_impl.HttpToolsProtocol.__init__,
        (
            "self.scope self.connections self.flow self.transport self.pipeline self.parser"
            " self.loop self.access_log self.server_state"
        ),
    ),
    (
        httptools_impl.RequestResponseCycle.__init__,
        (
            "self.disconnected self.keep_alive self.waiting_for_100_continue self.response_started self.response_complete"
            " self.chunked_encoding self.default_headers self.message_event self.on_response"
        ),
    ),
    (
        httptools_impl.RequestResponseCycle.send,
        (
            "response_started = True|waiting_for_100_continue = False|response_complete = True|message_event.set()"
            "|if not self.keep_alive:|self.transport.close()|self.on_response()"
        ),
    ),
    (flow_control.FlowControl, "write_paused resume_reading"),
    (uvicorn.Server, "_serve"),
    # shared/nats_client.py: the way from the parser to a subscription, and from `publish` to the socket
    (
        nats_client.Client.publish,
        "payload_size > self._max_payload|self.is_draining_pubs|self.is_connected|self._send_publish(",
    ),
    (nats_client.Client._send_publish, "NATS_HDR_LINE|hpub_cmd(subject, reply, hdr, payload)|_send_command(pub_cmd)"),
    (nats_client.Client._send_command, "self._pending.append(cmd)|self._pending_data_size"),
    (nats_client.Client._flusher, "self._transport.writelines(self._pending[:])|self._pending = []"),
    (
        nats_client.Client._process_msg,
        "sid: int|subject: bytes|reply: bytes|data: bytes|headers: bytes|_process_headers",
    ),
    (nats_client.Client._process_info, "info: Dict[str, Any]|initial_connection: bool"),
    (nats_transport.TcpTransport.__init__, "self._io_writer"),
    (Subscription.__init__, "self._id"),
]


@pytest.mark.parametrize(("owner", "parts"), PARTS, ids=lambda part: getattr(part, "__qualname__", ""))
def test_private_parts_are_as_they_were(owner, parts):
    source = inspect.getsource(owner)
    missing = [part for part in (parts.split("|") if "|" in parts else parts.split()) if part not in source]
    assert not missing, f"{owner.__module__}.{owner.__qualname__} has changed: {missing}"


@pytest.mark.parametrize("name", ["uvicorn", "nats-py"])
def test_their_versions_are_bounded_to_the_next_release(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (one for one in map(Requirement, project["dependencies"]) if one.name == name)
    least = min(Version(one.version) for one in found.specifier)
    assert not found.specifier.contains(f"{least.major}.{least.minor + 1}.0"), f"{name} is not bounded: {found}"
