"""What a server counts and measures, for Prometheus."""

import jax
import prometheus_client as prometheus

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """The counters of one server."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        kind = {"registry": self.registry}
        self.requests = prometheus.Counter("cola_requests", "Requests by path and status", ["path", "status"], **kind)
        self.prompt_tokens = prometheus.Counter("cola_prompt_tokens", "Tokens of prompts that were accepted", **kind)
        self.tokens = prometheus.Counter("cola_generated_tokens", "Tokens that were generated", **kind)
        self.images = prometheus.Counter("cola_generated_images", "Images that were drawn", **kind)
        self.cancelled = prometheus.Counter("cola_cancelled_sequences", "Sequences whose client was gone", **kind)
        self.compilations = prometheus.Counter("cola_compilations", "Programs compiled since the start", **kind)
        self.prefixes = prometheus.Gauge("cola_prefixes", "Lookups of a prompt's beginning", ["found"], **kind)
        self.waiting = prometheus.Gauge("cola_waiting_sequences", "Sequences that wait for a place", **kind)
        self.active = prometheus.Gauge("cola_active_sequences", "Sequences on their way", **kind)
        self.size = prometheus.Gauge("cola_batch_size", "Places of the batches on their way", **kind)
        self.units = prometheus.Histogram(
            "cola_unit_seconds", "Time of one unit of a batch: a block, or a few tokens", buckets=_SECONDS, **kind
        )
        self.first = prometheus.Histogram(
            "cola_first_unit_seconds", "From a request to its first new text", buckets=_SECONDS, **kind
        )
        self.seconds = prometheus.Histogram(
            "cola_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, **kind
        )
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event: str, duration: float, **_) -> None:
        if event == _COMPILED:
            self.compilations.inc()

    def page(self) -> bytes:
        """What GET /metrics answers."""
        return prometheus.generate_latest(self.registry)
