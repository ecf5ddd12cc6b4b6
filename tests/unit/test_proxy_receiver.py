"""What a connection has read is handed on as a copy, and does not stay where it was read into."""

from __future__ import annotations

from compute.proxy.session import Receiver


class Collecting(Receiver):
    def __init__(self) -> None:
        self.received: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.received.append(data)


def test_the_shared_buffer_is_empty_again_and_what_was_read_is_not() -> None:
    one, other = Collecting(), Collecting()
    for receiver, data in ((one, b"of one project" * 1000), (other, b"of another")):
        room = receiver.get_buffer(-1)
        room[: len(data)] = data
        receiver.buffer_updated(len(data))
        assert not any(room)
    assert one.received == [b"of one project" * 1000]
    assert other.received == [b"of another"]


def test_a_full_buffer() -> None:
    receiver = Collecting()
    room = receiver.get_buffer(-1)
    room[:] = b"x" * len(room)
    receiver.buffer_updated(len(room))
    assert receiver.received == [b"x" * len(room)]
    assert not any(room)
