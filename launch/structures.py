"""Writes a corpus whose texts obey a rule that reaches far, and prompts that show whether a model keeps it.

    python launch/structures.py --rule=dyck --output=runs/dyck
    python launch/train.py --config=configs/text.py --config.data.files=runs/dyck/dyck.txt \\
        --config.data.document_separator=$'\\n' --config.data.packing=pad --workdir=runs/dyck/cola
    python launch/evaluate.py --checkpoint=runs/dyck/cola --task=dyck --data=runs/dyck --output=runs/dyck/answers

Rules: dyck (brackets of many kinds), json (of one schema), copy and reverse (of words). A document is a line. Prompts
are beginnings of documents that are not in the corpus, cut where something is open; the first ones are empty: from
nothing. All answers have the same budget, what the longest prompt leaves of the context: it must be twice the longest
document. docs/tasks.md has results.
"""

import itertools
import json

from absl import flags

from cola_jax import cli, paths
from cola_jax.data import structures
from cola_jax.data.structures import Sizes
from cola_jax.types import UserError

_RULE = flags.DEFINE_enum("rule", None, list(structures.RULES), "that the texts obey")
_OUTPUT = flags.DEFINE_string("output", None, "directory of RULE.txt and RULE.jsonl")
_DOCUMENTS = flags.DEFINE_integer("documents", 50_000, "of the corpus", 1)
_PROMPTS = flags.DEFINE_integer("prompts", 500, "that leave something open", 1)
_EMPTY = flags.DEFINE_integer("empty", 200, "prompts that are empty", 0)
_KINDS = flags.DEFINE_integer("kinds", Sizes().kinds, "of brackets, --rule=dyck", 1, 676)
_LONGEST = flags.DEFINE_integer("longest", Sizes().longest, "pairs of brackets, or words that come again, at most", 2)
_SEED = flags.DEFINE_integer("seed", 0, "of all draws", 0)


def main() -> None:
    for flag in (_RULE, _OUTPUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: it must be given ({flags.FLAGS[flag.name].help})")
    rule, place = structures.RULES[_RULE.value], paths.local(_OUTPUT.value, "--output")
    sizes = Sizes(_KINDS.value, _LONGEST.value)
    drawn = structures.documents(rule, sizes, 2 * _SEED.value)
    corpus = list(itertools.islice(drawn, _DOCUMENTS.value))
    others = structures.documents(rule, sizes, 2 * _SEED.value + 1)
    asked = [("", text) for text in itertools.islice(others, _EMPTY.value)]
    asked += structures.prompts(rule, sizes, 2 * _SEED.value + 1, set(corpus), _PROMPTS.value)
    rows = [{"id": index, "context": prompt, "answer": rest} for index, (prompt, rest) in enumerate(asked)]
    place.mkdir(parents=True, exist_ok=True)
    paths.write_atomically(place / f"{_RULE.value}.txt", "".join(f"{text}\n" for text in corpus).encode())
    paths.write_atomically(place / f"{_RULE.value}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{place}: {len(corpus)} documents, {len(rows)} prompts, {_EMPTY.value} of them empty")
    longest = max(len(text.split(" ")) for text in corpus)
    print(f"the longest document has {longest} words; the context must hold twice its tokens, for any answer to fit")


if __name__ == "__main__":
    cli.run(main)
