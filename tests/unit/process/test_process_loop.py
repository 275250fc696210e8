import os

from helixflow.process.loop import Loop


def test_timers_fire_in_order_and_cancelled_ones_do_not() -> None:
    loop = Loop()
    seen: list[str] = []
    loop.call_later(0.002, loop.stop)
    loop.call_later(0.001, lambda: seen.append("second"))
    loop.call_later(0, lambda: seen.append("first"))
    loop.call_later(0, lambda: seen.append("never")).cancel()
    loop.run()
    loop.close()
    assert seen == ["first", "second"]


def test_a_descriptor_forgotten_by_a_callback_of_the_same_round_is_not_called() -> None:
    loop = Loop()
    pairs = [os.pipe(), os.pipe()]
    seen: list[int] = []

    def take(index: int) -> None:
        seen.append(index)
        for read, _ in pairs:
            loop.watch(read)
        loop.stop()

    for index, (read, write) in enumerate(pairs):
        os.write(write, b"x")
        loop.watch(read, lambda index=index: take(index))  # type: ignore[misc]
    loop.run()
    loop.close()
    for fds in pairs:
        for fd in fds:
            os.close(fd)
    assert len(seen) == 1
