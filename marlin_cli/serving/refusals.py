"""What a client is told in place of an answer: a status and OpenAI's error object, with one line that says what to do."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from marlin_cli.text import printable

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(Exception):
    """A request that is not answered; whatever is raised beside it is a bug.

    Attributes:
        parameter: the field that it is about, where there is one.
        code: a word for programs, where OpenAI has one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.parameter = None if parameter is None else printable(parameter)  # a client may have made up the name
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """As OpenAI's clients read it; in a stream of events too."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}

    def response(self) -> JSONResponse:
        """As a response."""
        return JSONResponse(self.document(), self.status, self.headers)


def bad(message: str, parameter: str | None = None) -> Refusal:
    """A request that asks for what cannot be."""
    return Refusal(400, message, parameter=parameter)
