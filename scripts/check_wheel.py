"""Check built packages: use an installed one, or compare their contents with the clone.

python check_wheel.py                 use an installed rotormlx, outside the clone
python check_wheel.py contents DIST   compare the wheel and the sdist in DIST with the clone
python check_wheel.py release DIST    the same for a release, one wheel per kind of machine
python check_wheel.py same A B        compare two folders, built in different places and times
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]
# Contents of the package: folders of the clone, their places in a wheel, and their kinds of files.
# Any other file is in the wheel by mistake.
PARTS = {
    "rotormlx": ("rotormlx", {".py", ".typed", ".html"}),
    "cuda_kernels": ("rotormlx/cuda_kernels", {".cu", ".cuh", ".h", ".cpp"}),
    "metal_kernels": ("rotormlx/metal_kernels", {".metal", ".h"}),
    "shared_kernels": ("rotormlx/shared_kernels", {".h"}),
    "tests/vectors": ("rotormlx/vectors", {".safetensors"}),
}
# Files next to the package; the environment variable ROTORMLX needs both.
SWITCH = {"rotormlx_switch.pth", "rotormlx_switch.py"}
LIBRARY = "rotormlx/librotormlx_cpu.so"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
# Machines of a release, by the ends of wheel tags.
MACHINES = ("macosx_*_arm64", "manylinux_*_x86_64", "manylinux_*_aarch64")


def main() -> None:
    """Run the check that the arguments select."""
    match sys.argv[1:]:
        case []:
            use()
        case ["contents", folder]:
            check_contents(*built(Path(folder), ["*.whl", "*.tar.gz"]))
        case ["release", folder]:
            wheels = [f"*-py3-none-{machine}.whl" for machine in MACHINES]
            check_contents(*built(Path(folder), [*wheels, "*.tar.gz"]))
        case ["same", first, second]:
            compare(Path(first), Path(second))
        case _:
            sys.exit(__doc__)


def use() -> None:
    """Compress a cache with an installed rotormlx, and run its command."""
    import mlx.core as mx  # noqa: PLC0415

    import rotormlx  # noqa: PLC0415

    package = Path(rotormlx.__file__).parent
    if "site-packages" not in package.parts:
        sys.exit(f"An installed rotormlx is required, but {package} was imported.")
    cache = rotormlx.RotorKVCache()
    keys = mx.random.normal((1, 2, 300, 64))
    cache.update_and_fetch(keys, keys)
    if cache.packed_tokens != 192:
        sys.exit(f"A cache of 300 tokens must have 192 packed, but it has {cache.packed_tokens}.")
    require_library()
    command = Path(sys.executable).parent / "rotormlx"
    print(subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout)


def require_library() -> None:
    """Refuse a wheel for one kind of machine if its CPU library does not load."""
    from rotormlx.kernels import cpu_library  # noqa: PLC0415

    wheel = metadata.distribution("rotormlx").read_text("WHEEL") or ""
    reason = cpu_library.missing()
    if "Tag: py3-none-any" not in wheel and reason:
        sys.exit(f"The CPU library of a wheel for this machine must load, but: {reason}")


# ---- contents -----------------------------------------------------------------------------------


def built(folder: Path, patterns: list[str]) -> list[Path]:
    """Return the files of a folder, the sdist last; one per pattern, and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    matching = [sorted(folder.glob(pattern)) for pattern in patterns]
    if [len(paths) for paths in matching] != [1] * len(patterns) or len(names) != len(patterns):
        sys.exit(f"{folder} must hold one each of {patterns} and nothing else, but holds {names}.")
    return [paths[0] for paths in matching]


def check_contents(*paths: Path) -> None:
    """Compare each wheel, and the sdist, which comes last, with the clone."""
    *wheels, sdist = paths
    for wheel in wheels:
        check(wheel.name, in_wheel(wheel), wanted_in_wheel(wheel))
    check(sdist.name, in_sdist(sdist), wanted_in_sdist())


def check(name: str, listed: list[str], wanted: set[str]) -> None:
    """Refuse an unlisted, missing or duplicate file."""
    wrong = sorted(f"+ {path}" for path in set(listed) - wanted)
    wrong += sorted(f"- {path}" for path in wanted - set(listed))
    wrong += sorted(f"twice: {path}" for path in set(listed) if listed.count(path) > 1)
    if wrong:
        sys.exit(f"{name} must hold exactly the files of the clone, but:\n" + "\n".join(wrong))
    print(f"{name}: {len(listed)} files, as listed")


def in_wheel(path: Path) -> list[str]:
    """Return the names of all files; auditwheel and delocate also list folders."""
    with zipfile.ZipFile(path) as wheel:
        return [name for name in wheel.namelist() if not name.endswith("/")]


def in_sdist(path: Path) -> list[str]:
    """Return the names of all files, without their top folder."""
    with tarfile.open(path) as sdist:
        return [member.name.partition("/")[2] for member in sdist]


def wanted_in_wheel(path: Path) -> set[str]:
    """Return the files that a wheel must hold; a wheel for any machine has no CPU library."""
    of_package = {
        place + name.removeprefix(folder)
        for folder, (place, kinds) in PARTS.items()
        for name in files_of_clone(folder)
        if Path(name).suffix in kinds
    }
    name, version, *tag = path.name.removesuffix(".whl").split("-")
    library = set() if tag == ["py3", "none", "any"] else {LIBRARY}
    about = {f"{name}-{version}.dist-info/{file}" for file in METADATA}
    return of_package | SWITCH | library | about


def wanted_in_sdist() -> set[str]:
    """Return the files that pyproject.toml includes, and those that hatchling adds."""
    table = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))
    included = table["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    return {*files_of_clone(*included), ".gitignore", "pyproject.toml", "PKG-INFO"}


def files_of_clone(*paths: str) -> list[str]:
    """Return the files of the clone that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    done = subprocess.run(command, cwd=CLONE, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name and (CLONE / name).is_file()]


# ---- the same bytes -----------------------------------------------------------------------------


def compare(first: Path, second: Path) -> None:
    """Refuse two builds that differ, and name the files that differ."""
    if {path.name for path in first.iterdir()} != {path.name for path in second.iterdir()}:
        sys.exit(f"{first} and {second} must hold files with the same names, but they do not.")
    for path in sorted(first.iterdir()):
        digests = [
            hashlib.sha256((p / path.name).read_bytes()).hexdigest() for p in (first, second)
        ]
        if digests[0] != digests[1]:
            sys.exit(
                f"{path.name} must have the same bytes wherever and whenever it is built, but the "
                f"builds differ in {differing(path, second / path.name) or 'times or order'}."
            )
        print(f"{digests[0]}  {path.name}, twice")


def differing(first: Path, second: Path) -> list[str]:
    """Return the names of files inside two archives whose bytes differ."""
    contents = []
    for path in (first, second):
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                contents.append({name: wheel.read(name) for name in wheel.namelist()})
        else:
            with tarfile.open(path) as sdist:
                files = [member for member in sdist if member.isfile()]
                contents.append({m.name: sdist.extractfile(m).read() for m in files})  # type: ignore[union-attr]
    names = set(contents[0]) | set(contents[1])
    return sorted(name for name in names if contents[0].get(name) != contents[1].get(name))


if __name__ == "__main__":
    main()
