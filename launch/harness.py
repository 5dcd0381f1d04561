"""lm-evaluation-harness on a checkpoint: its command line, which knows the model `cola_jax` here.

    pip install -e '.[eval]'
    python launch/harness.py --model cola_jax --model_args checkpoint=runs/quickstart --tasks mine --include_path tasks

Every argument is lm_eval's. Releases of lm_eval that look for the entry points of other packages (0.4.13 does not)
know the model without this binary: `lm-eval --model cola_jax ...`. docs/tasks.md explains the model's arguments.
"""

import sys

from cola_jax.train import interrupts
from cola_jax.types import UserError


def main() -> None:
    try:
        import lm_eval.models  # noqa: F401  # registers those that it brings
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(f"needs the package {error.name}: pip install -e '.[eval]'") from error
    if "cola_jax" not in model_registry:
        model_registry.register("cola_jax", target="cola_jax.evaluation.harness:ColaJax")
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(interrupts.BAD_INPUT)
