"""Write requirements.lock: the pinned packages with the SHA-256 of their files (make lock).

Reads pip's report of what it would install here. Hashes of the same version from other
interpreters and platforms stay in the file.
"""

import json
import re
import sys
from pathlib import Path

HEAD = """\
# Every package of constraints.txt with the SHA-256 of its files, for pip install --require-hashes.
# Linux on x86-64, Python 3.11 and 3.13; torch as its CPU build. Written by make lock.
"""


def main(report: Path, lock: Path) -> None:
    """Merge a report into the lock."""
    pinned = Path("constraints.txt").read_text(encoding="utf-8").split()
    versions = dict(line.lower().split("==") for line in pinned if "==" in line)
    hashes: dict[str, set[str]] = {name: set() for name in versions}
    for line in lock.read_text(encoding="utf-8").splitlines() if lock.exists() else ():
        name, _, version = line.partition(" ")[0].partition("==")
        if versions.get(name) == version:
            hashes[name] |= set(re.findall(r"sha256:\w+", line))
    for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        # The torch of PyPI brings packages of several GB for GPUs, which are not pinned.
        if versions.get(name) == version.partition("+")[0] and (name != "torch" or "+" in version):
            hashes[name].add("sha256:" + item["download_info"]["archive_info"]["hashes"]["sha256"])
    lines = (
        " ".join([f"{name}=={versions[name]}", *(f"--hash={value}" for value in sorted(values))])
        for name, values in sorted(hashes.items())
        if values
    )
    lock.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path("requirements.lock"))
