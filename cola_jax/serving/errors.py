"""Errors as clients of the OpenAI interface expect them."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or fails.

    Attributes:
      status: of HTTP.
      param: the field that is wrong, or None.
      code: a word for programs, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict:
        """What is answered."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When the client may come again."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
