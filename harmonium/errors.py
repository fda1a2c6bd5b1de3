"""Every exception that Harmonium raises, as one tree.

    HarmoniumError
    ├── ConfigError              a setting, a path or an option that cannot be used           exit 2
    │   └── MemoryPlanError      the plan needs more memory than the machine has              exit 2
    ├── CheckpointError          a file of a checkpoint breaks its format or its config       exit 1
    ├── HubError                 a download that cannot be had, or ended                      exit 1
    ├── RequestError             a request that can never succeed                             HTTP 400
    │   └── PromptTooLong        the prompt does not fit the context                          HTTP 400
    ├── EngineError              the engine failed                                            HTTP 500
    │   ├── EngineBusy           the queue is full: try again after `retry_after_seconds`     HTTP 503
    │   └── EngineClosed         the engine is not (or no longer) running                     HTTP 503
    ├── StoreError               the database of stored responses failed                      HTTP 503
    ├── TrainingError            training cannot go on: the loss is no number                 exit 1
    ├── HarmonyError             messages that the Harmony format cannot express              HTTP 400
    └── ApiError                 what only HTTP can get wrong: keys, bodies, unknown names    its own status

A message names the thing, the value and the limit. `exit_code` is what the command line ends with,
`status` what the HTTP API answers, `code` the machine-readable name in an API error body.
"""

from __future__ import annotations

from collections.abc import Mapping


class HarmoniumError(Exception):
    """Base of all our errors. Catch it to catch everything that Harmonium raises on purpose."""

    exit_code = 1
    status = 500
    code = "internal_error"


class ConfigError(HarmoniumError):
    """A setting, path or option cannot be used as given."""

    exit_code = 2
    status = 400
    code = "invalid_config"


class MemoryPlanError(ConfigError):
    """Weights, cache and scratch do not fit the memory that this process may use."""

    code = "memory_plan"


class CheckpointError(HarmoniumError):
    """A checkpoint's file breaks its format, or disagrees with its own config.

    The message starts with the file, then the tensor (if one is concerned), the value found and what was
    expected.
    """

    exit_code = 1
    code = "invalid_checkpoint"


class HubError(HarmoniumError):
    """A hub did not give what was asked of it: no network, no such model, not allowed, wrong bytes."""

    exit_code = 1
    status = 502
    code = "hub_error"


class RequestError(HarmoniumError):
    """A request that cannot succeed however often it is sent."""

    exit_code = 2
    status = 400
    code = "invalid_request"


class PromptTooLong(RequestError):
    """The prompt (or the prompt plus one token) is longer than the context."""

    code = "context_length_exceeded"


class EngineError(HarmoniumError):
    """The engine failed while it worked on a request that was fine."""

    code = "engine_error"


class EngineBusy(EngineError):
    """No room in the queue now; the same request may succeed after `retry_after_seconds`."""

    status = 503
    code = "engine_busy"

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineClosed(EngineError):
    """The engine has been closed, or is closing."""

    status = 503
    code = "engine_closed"


class UpstreamError(EngineError):
    """The server that computes for us broke off, took too long, or said what we do not understand."""

    status = 502
    code = "upstream_error"


class UpstreamUnavailable(EngineError):
    """No server that computes for us can be reached now; the same request may succeed later."""

    status = 503
    code = "upstream_unavailable"


class StoreError(HarmoniumError):
    """The database of stored responses cannot be reached, or failed; the same request may succeed later."""

    status = 503
    code = "store_unavailable"


class TrainingError(HarmoniumError):
    """Training cannot go on; the states that were saved before are good."""

    code = "training_failed"


class HarmonyError(HarmoniumError):
    """Messages that cannot be written in the Harmony format."""

    exit_code = 2
    status = 400
    code = "invalid_messages"


class ApiError(HarmoniumError):
    """A failure of an HTTP request, with all that OpenAI's error object says of it.

    status: of the answer. type: None takes the usual one of the status. param: the field of the request that
    is meant. retry_after_seconds: when to try again. headers: further ones of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str | None = None,  # noqa: A002  # OpenAI's name for it
        param: str | None = None,
        code: str | None = "invalid_request",
        retry_after_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code  # type: ignore[assignment]  # OpenAI's object may have null here
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})
