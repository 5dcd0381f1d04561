"""What a server holds its clients to, and how it batches them."""

import dataclasses

from cola_jax.fields import check, setting


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Limits and batches of a server; each field is a flag of `launch/serve.py`."""

    batch_sizes: tuple[int, ...] = setting(
        (1, 8, 32),
        "sequences that are generated together: the smallest size that holds those that are there; each is compiled "
        "before the server answers",
        at_least=1,
        where=(lambda value: len(value) > 0 and list(value) == sorted(set(value)), "ascending, at least one"),
    )
    context: int = setting(0, "most tokens of prompt and output together; 0: what the model was trained on", at_least=0)
    max_tokens: int = setting(0, "most new tokens of a sequence; 0: the context", at_least=0)
    max_prompt_tokens: int = setting(0, "most tokens of a prompt; 0: what the context leaves", at_least=0)
    max_sequences: int = setting(64, "most sequences of one request: its prompts times n", at_least=1)
    queue: int = setting(256, "sequences that may wait for a place; a request for more is answered 429", at_least=0)
    request_seconds: float = setting(300.0, "longest time from a request to the end of its answer", above=0)
    drain_seconds: float = setting(30.0, "longest time from SIGTERM to the end, for what has begun", at_least=0)
    body_bytes: int = setting(1 << 20, "longest body of a request", at_least=1)
    prefixes: int = setting(
        64, "most prompts whose caches are kept for further requests with the same; 0: none", at_least=0
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "serving ")
