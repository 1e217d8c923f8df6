"""``python -m tests.schemas.update``: write today's messages as the golden ones.

Refuses a change that processes of the released version could not bear, unless ``--break`` says
that this is wanted: a breaking change is a new type on new subjects.
"""

import sys

from tests.schemas.schemas import (
    CORPUS,
    SCHEMAS,
    broken_promises,
    current_corpus,
    current_schemas,
    golden,
    write,
)


def main() -> int:
    schemas = current_schemas()
    problems = broken_promises(golden(SCHEMAS), schemas) if SCHEMAS.exists() else []
    if problems and "--break" not in sys.argv[1:]:
        sys.stderr.write("\n".join([*problems, "not written: these break old processes", ""]))
        return 1
    write(SCHEMAS, schemas)
    # Bytes once promised stay in the corpus for as long as their type lives.
    kept = golden(CORPUS) if CORPUS.exists() and "--break" not in sys.argv[1:] else {}
    new = current_corpus()
    for name, payload in kept.items():
        if new.get(name, payload) != payload:
            variant = sum(key.split("@")[0] == name for key in kept)
            new[f"{name}@{variant}"] = payload
        else:
            new[name] = payload
    write(CORPUS, dict(sorted(new.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
