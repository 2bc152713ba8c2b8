"""What the tests of each system cost, of a report of pytest, and whether any takes more than its share.

    pytest --junitxml=report.xml && python tests/shares.py report.xml

A test belongs to the system that its parameter names (a config, a recording), otherwise to its file. Shares do not
depend on the machine, as times do: with N systems one of them may take LIMIT times the N-th part of what all of them
take, and a file outside of tests/systems FILE of everything. Exit code 1, with the names, where one takes more.
"""

import re
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

LIMIT = 8.0  # times the average system
FILE = 0.08  # of all seconds
SYSTEM = re.compile(r"\[(?:configs/|golden/)?([\w./]*?)(?:\.py)?(?:[:,-][^\]]*)?\]$")


def seconds(report: Path) -> tuple[Counter, Counter]:
    """(seconds of each system, seconds of each file outside of tests/systems)."""
    systems, files = Counter(), Counter()
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        file, name, spent = case.get("classname", ""), case.get("name", ""), float(case.get("time", 0))
        if ".systems." not in file:
            files[file] += spent
            continue
        found = SYSTEM.search(name)
        named = found and found[1] in known()
        systems[found[1] if named else file.rpartition(".")[2]] += spent
    return systems, files


def known() -> set[str]:
    """Names by which a parameter may mean a system."""
    root = Path(__file__).parents[1]
    configs = {str(path.relative_to(root / "configs").with_suffix("")) for path in root.glob("configs/*/*.py")}
    return configs | {path.parent.name for path in root.glob("tests/golden/*/config.json")}


def main(report: Path) -> int:
    """Prints the table; how many take more than their share."""
    systems, files = seconds(report)
    whole, fair = systems.total() + files.total(), systems.total() / max(len(systems), 1)
    print(f"{whole:.0f} s in all, of {len(systems)} systems {systems.total():.0f} s, {fair:.1f} s each")
    for name, spent in systems.most_common(12):
        print(f"  {spent:7.1f} s  {spent / fair:4.1f} times the average  {name}")
    for name, spent in files.most_common(8):
        print(f"  {spent:7.1f} s  {spent / whole:5.1%}  {name}")
    over = [name for name, spent in systems.items() if spent > LIMIT * fair]
    over += [name for name, spent in files.items() if spent > FILE * whole]
    if over:
        print(
            f"more than their share: {', '.join(over)}: share compiled programs, shrink a recording, or mark tests slow"
        )
    return len(over)


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
