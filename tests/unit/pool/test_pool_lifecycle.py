import pytest

from helixflow.core.capacity import Replica
from helixflow.pool.lifecycle import (
    CrashHistory,
    GiveUp,
    Restart,
    SeatView,
    ServingReplica,
    State,
    cause_of_exit,
    combine,
)
from helixflow.process.backoff import Backoff
from helixflow.rpc.generated.pool_v1 import pool_pb2

SERVING = ServingReplica(Replica("r", "127.0.0.1", 1, "k", 4, 8192), 7)


def history() -> CrashHistory:
    return CrashHistory(Backoff(jitter=0))


def test_states_are_those_of_the_proto() -> None:
    named = {state.value: f"DEPLOYMENT_STATE_{state.name}" for state in State}
    assert named == {number: name for name, number in pool_pb2.DeploymentState.items() if number}


def test_five_failed_starts_in_a_row_open_the_breaker() -> None:
    seat = history()
    assert [seat.decide(None) for _ in range(5)] == [Restart(0.5), Restart(1), Restart(2), Restart(4), GiveUp()]


def test_an_engine_that_was_ready_is_restarted_for_ever() -> None:
    seat = history()
    decisions = [seat.decide(1.0) for _ in range(50)]
    assert all(isinstance(decision, Restart) for decision in decisions)
    assert decisions[-1] == Restart(30)


def test_being_ready_once_forgives_failed_starts() -> None:
    seat = history()
    for _ in range(4):
        seat.decide(None)
    seat.decide(5.0)
    assert isinstance(seat.decide(None), Restart)


def test_asking_again_starts_anew() -> None:
    seat = history()
    for _ in range(5):
        seat.decide(None)
    seat.forgive()
    assert seat.decide(None) == Restart(0.5)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([State.IDLE], State.IDLE),
        ([State.FAILED, State.READY], State.READY),
        ([State.BACKOFF, State.LOADING], State.LOADING),
        ([State.BACKOFF, State.FAILED], State.BACKOFF),
        ([State.FAILED, State.FAILED], State.FAILED),
        ([State.PULLING, State.PULLING], State.PULLING),
    ],
)
def test_the_best_seat_is_what_a_deployment_offers(states: list[State], expected: State) -> None:
    view = combine("m/llama_cpp-0", [SeatView(state) for state in states], restarts=0, now=0)
    assert view.state is expected


def test_backoff_says_when_to_come_back() -> None:
    seats = [SeatView(State.BACKOFF, "slow", retry_at=110), SeatView(State.BACKOFF, "soon", retry_at=103)]
    view = combine("d", seats, restarts=2, now=100)
    assert (view.retry_after_s, view.detail, view.restarts) == (3, "soon", 2)


def test_only_serving_replicas_are_shown_and_trouble_is_mentioned() -> None:
    seats = [SeatView(State.READY, serving=SERVING), SeatView(State.FAILED, "no memory")]
    view = combine("d", seats, restarts=0, now=0)
    assert view.replicas == (SERVING,)
    assert "no memory" in view.detail


def test_a_further_replica_that_does_not_fit_is_mentioned() -> None:
    seats = [SeatView(State.READY, serving=SERVING), SeatView(State.IDLE, "no room: 2 of 1", lacks_memory=True)]
    view = combine("d", seats, restarts=0, now=0)
    assert (view.state, view.detail) == (State.READY, "a replica is not loaded: no room: 2 of 1")


BROKEN = (
    "0.00.058.171 E llama_model_load: error loading model: tensor 'x' is not within the file bounds",
    "0.00.058.188 E cmn  common_init_: failed to load model 'cut.gguf'",
    " E llama.cpp does not start: Failed to init server, please check the input params.",
)


def test_the_first_error_is_why_a_model_does_not_load() -> None:
    cause = cause_of_exit(1, BROKEN, was_ready=False)
    assert cause == "llama_model_load: error loading model: tensor 'x' is not within the file bounds"


def test_later_the_last_error_counts() -> None:
    assert cause_of_exit(1, BROKEN[:2], was_ready=True) == "common_init_: failed to load model 'cut.gguf'"


# vLLM 0.32, shortened: of a file that was cut short, and of a context that the model does not have.
VLLM_CUT = (
    "(Worker pid=20859) ERROR 11-23 08:34:04 [multiproc_executor.py:953] Traceback (most recent call last):",
    "(Worker pid=20859) ERROR 11-23 08:34:04 [executor.py:9] safetensors.SafetensorError: incomplete metadata",
    "    raise RuntimeError(",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
)
VLLM_CONTEXT = (
    "(APIServer pid=19688) WARNING 11-23 08:32:02 [system_utils.py:255] This can cause errors like `OSError: 24`",
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
    "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len",
    "    For further information visit https://errors.pydantic.dev",
)


@pytest.mark.parametrize(
    ("tail", "cause"),
    [
        (VLLM_CUT, "safetensors.SafetensorError: incomplete metadata"),
        (VLLM_CONTEXT, "Value error, User-specified max_model_len (999999) is greater than the derived max_model_len"),
    ],
)
def test_the_first_exception_of_an_engine_in_python(tail: tuple[str, ...], cause: str) -> None:
    assert cause_of_exit(1, tail, was_ready=False) == cause


@pytest.mark.parametrize(
    ("status", "tail", "was_ready", "words"),
    [
        (-9, (), True, "SIGKILL"),
        (-11, (), True, "signal 11"),
        (2, (), False, "status 2"),
        (127, ("llama-server: error while loading shared libraries",), False, "shared libraries"),
        (-9, ("listening",), False, "SIGKILL"),
    ],
)
def test_without_an_error_line_the_status_speaks(
    status: int, tail: tuple[str, ...], was_ready: bool, words: str
) -> None:
    assert words in cause_of_exit(status, tail, was_ready=was_ready)


def test_a_cause_is_one_bounded_line() -> None:
    cause = cause_of_exit(1, ["x\ty" * 1000], was_ready=False)
    assert "\t" not in cause
    assert len(cause) <= 300
