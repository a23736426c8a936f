"""MOSES's own metrics of drawn molecules, by its package, which needs older numpy and pandas: run it in its own environment.

    python -m venv moses && moses/bin/pip install torch rdkit scipy tqdm fcd_torch matplotlib 'numpy<2' 'pandas<2'
    moses/bin/pip install --no-deps molsets
    moses/bin/python benchmarks/quality/moses_metrics.py drawn.smi [out.json]

`drawn.smi`: the SMILES of each on a line of its own, `invalid` for what is not a molecule.
"""

import json
import sys
import types
from pathlib import Path


def main() -> None:
    """See the module."""
    six = types.ModuleType("rdkit.six")  # newer versions of RDKit lack it, and MOSES needs one of its functions
    six.iteritems = lambda table: iter(table.items())  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["rdkit.six"] = six
    import moses.metrics  # pyright: ignore[reportMissingImports]

    drawn = Path(sys.argv[1]).read_text().split()
    found = moses.metrics.get_all_metrics(drawn, k=[len(drawn)], n_jobs=1, device="cpu")
    text = json.dumps({"drawn": len(drawn), **{name: round(float(value), 4) for name, value in found.items()}}, indent=1)
    print(text)
    for out in sys.argv[2:3]:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    main()
