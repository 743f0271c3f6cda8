#!/usr/bin/env bash
# Everything that building and running AArch64 code on an x86-64 Debian takes, in .arm/: an emulator, a root with Python, and the
# packages of requirements.txt's torch. Only the cross compiler and mmdebstrap are installed into the system, where they are missing.
#
# A step that has its stamp costs nothing. usage: tools/arm/setup.sh [python|cost]: without either only what the C++ tests need.
# Status 3: this machine cannot have it (no Debian on x86-64, no root, or a download failed); the last line says which.
set -euo pipefail
cd "$(dirname "$0")/../.."
arm=$PWD/.arm
mkdir -p "$arm"

unable() {
  echo "no emulated AArch64 on this machine: $*" >&2
  exit 3
}
[[ $(uname -m) == x86_64 ]] || unable "expected x86-64, got $(uname -m)"
command -v apt-get >/dev/null || unable "expected Debian, got no apt-get"

as_root=(env DEBIAN_FRONTEND=noninteractive)
[[ $(id -u) == 0 ]] || as_root=(sudo -n "${as_root[@]}")

# done_before NAME: whether this script, as it is now, has left the stamp of that step.
stamp() { echo "$arm/.stamp-$1-$(sha256sum tools/arm/setup.sh | cut -c 1-12)"; }
done_before() { [[ -f $(stamp "$1") ]]; }
finish() { touch "$(stamp "$1")"; }

# Debian's own mirror, as apt knows it.
mirror() {
  apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }'
}

if ! done_before compiler; then
  if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v mmdebstrap >/dev/null || [[ -z $(mirror) ]]; then
    "${as_root[@]}" true || unable "installing the cross compiler needs root"
    # A list that fails may be one that is not needed.
    "${as_root[@]}" apt-get update -q </dev/null || true
    "${as_root[@]}" apt-get install -q -y --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross mmdebstrap </dev/null ||
      unable "apt-get cannot install the cross compiler and mmdebstrap"
  fi
  [[ -n $(mirror) ]] || unable "apt knows no mirror of Debian"
  finish compiler
fi

# The emulator of backports: bookworm's own knows neither Neoverse V1 nor N2. Unpacked here, so that the system's stays as it is.
if ! done_before qemu; then
  mkdir -p "$arm/apt/lists/partial" "$arm/apt/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) bookworm-backports main" >"$arm/apt/sources.list"
  private=(-o "Dir::Etc::SourceList=$arm/apt/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$arm/apt/lists"
    -o "Dir::Cache=$arm/apt/cache" -o APT::Sandbox::User=root -q)
  apt-get "${private[@]}" update || unable "apt-get cannot read the list of bookworm-backports"
  (cd "$arm/apt" && rm -f ./*.deb && apt-get "${private[@]}" download qemu-user) || unable "apt-get cannot download qemu"
  (cd "$arm/apt" && dpkg-deb -x ./*.deb unpacked)
  cp "$arm/apt/unpacked/usr/bin/qemu-aarch64" "$arm/qemu-aarch64"
  rm -rf "$arm/apt"
  finish qemu
fi

if ! done_before root; then
  rm -rf "$arm/root"
  packages=python3.11,libpython3.11-stdlib,libstdc++6,libgomp1,ca-certificates,libpython3.11-dev,libc6-dev
  mmdebstrap --quiet --variant=extract --architectures=arm64 --components=main --include=$packages bookworm "$arm/root" "$(mirror)" ||
    unable "mmdebstrap cannot make the arm64 root"
  finish root
fi

# llvm-mca, for tools/arm/cost.py.
if [[ ${1:-} == cost ]] && ! done_before llvm; then
  rm -rf "$arm/llvm"
  mkdir "$arm/llvm"
  (cd "$arm/llvm" && apt-get -q download llvm-19 libllvm19) || unable "apt-get cannot download llvm"
  (cd "$arm/llvm" && for deb in *.deb; do dpkg-deb -x "$deb" .; done && rm ./*.deb)
  finish llvm
fi

[[ ${1:-} == python ]] || exit 0

# torch 2.10.0: the last whose AArch64 wheel brings no CUDA. The other packages have the versions of $PYTHON's environment. --no-deps,
# because pip would judge the host's platform.
if ! done_before site; then
  rm -rf "$arm/site"
  platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_aarch64"); done
  # shellcheck disable=SC2046
  "$PYTHON" -m pip install -q --no-deps --only-binary=:all: "${platforms[@]}" --python-version 3.11 --implementation cp \
    --target "$arm/site" torch==2.10.0 $("$PYTHON" tools/arm/packages.py) || unable "pip cannot download the AArch64 packages"
  finish site
fi
