#!/usr/bin/env bash
# Runs the rows avx_vnni and amx, the very objects of the extension, on emulated CPUs that have them:
# Bochs 3.0 as an Arrow Lake and as a Sapphire Rapids, under Linux. It takes some 3 minutes for a row
# and needs Debian 12 with mmdebstrap and what builds kernel modules; nothing is installed.
#
# Bochs 3.0 multiplies the signed bytes of tdpbsud as unsigned ones, so `amx` runs without negative
# numbers; and it has no XFD, so Linux does not permit tiles there and a module switches them on.
#
# usage: tools/bochs/run.sh [avx_vnni] [amx]; after `make build`
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/tools/bochs build=$PWD/build/bochs
root=$build/root
mkdir -p "$build"

# The emulator, from Debian 13; nothing of it is installed.
if [ ! -f "$build/.stamp-root" ]; then
  rm -rf "$root"
  mmdebstrap --quiet --variant=extract --architectures=amd64 --components=main \
    --include=bochs,bochs-term,bochsbios,vgabios,isolinux,syslinux-common,genisoimage \
    trixie "$root" http://deb.debian.org/debian
  touch "$build/.stamp-root"
fi
loader=("$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu")

# The newest cloud kernel that apt knows, and the module, built with that kernel's headers.
if [ ! -f "$build/.stamp-kernel" ]; then
  version=$(apt-cache search --names-only '^linux-image-6[0-9.]*[+]deb12-cloud-amd64$' |
    sed 's/^linux-image-//; s/-cloud-amd64 .*//' | sort -V | tail -1)
  rm -rf "$build/kernel" && mkdir -p "$build/kernel"
  (
    cd "$build/kernel"
    apt-get download -q "linux-image-$version-cloud-amd64" "linux-headers-$version-cloud-amd64" \
      "linux-headers-$version-common" "linux-kbuild-$version"
    for package in *.deb; do dpkg -x "$package" .; done
  )
  headers=$build/kernel/usr/src/linux-headers-$version-cloud-amd64
  sed -i "s|/usr/src|$build/kernel/usr/src|" "$headers/Makefile"
  mkdir -p "$build/module"
  cp "$here/tiles.c" "$build/module"
  echo 'obj-m := tiles.o' >"$build/module/Kbuild"
  make -s -C "$headers" M="$build/module" CONFIG_DEBUG_INFO_BTF_MODULES= modules
  touch "$build/.stamp-kernel"
fi

tests/cpp/run.sh static "$build/tests"
cc -O1 -static -o "$build/init" "$here/init.c"

# emulate ROW MODEL MODE FEATURES [NAME=FILE]: boots, runs the row's tests, checks what they said.
emulate() {
  local row=$1 model=$2 mode=$3 features=$4 dir=$build/$1
  shift 4
  rm -rf "$dir" && mkdir -p "$dir/iso/isolinux"
  python3 "$here/initrd.py" "$dir/iso/initrd" init="$build/init" tests="$build/tests" "$@"
  cp "$build"/kernel/boot/vmlinuz-* "$dir/iso/vmlinuz"
  cp "$root/usr/lib/ISOLINUX/isolinux.bin" "$root/usr/lib/syslinux/modules/bios/ldlinux.c32" \
    "$dir/iso/isolinux"
  # Without 5-level paging and control-flow enforcement: Bochs 3.0 stops at the first system
  # management interrupt with either.
  cat >"$dir/iso/isolinux/isolinux.cfg" <<CONFIG
DEFAULT tests
LABEL tests
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 quiet nokaslr mitigations=off tsc=reliable no_timer_check lpj=1000000 nosmp no5lvl ibt=off nousershstk clearcpuid=amx_tile panic=-1 row=$row mode=$mode
CONFIG
  "${loader[@]}" "$root/usr/bin/genisoimage" -quiet -o "$dir/boot.iso" -no-emul-boot \
    -boot-load-size 4 -boot-info-table -b isolinux/isolinux.bin -c isolinux/boot.cat "$dir/iso"
  cat >"$dir/bochsrc" <<CONFIG
config_interface: textconfig
display_library: term
megs: 512
romimage: file=$root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$root/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=$model, count=1, ips=200000000, reset_on_triple_fault=0
ata0-master: type=cdrom, path=$dir/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$dir/serial.txt
log: $dir/log.txt
panic: action=fatal
error: action=ignore
clock: sync=none
CONFIG
  # The terminal display wants a terminal. Switching off is a panic to Bochs: its status says nothing.
  LTDL_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu/bochs/plugins BXSHARE=$root/usr/share/bochs TERM=xterm \
    timeout "${BOCHS_SECONDS:-1800}" script -qec "${loader[*]} $root/usr/bin/bochs-bin -q -f $dir/bochsrc" /dev/null \
    >"$dir/screen.txt" 2>&1 || true
  tr -d '\r' <"$dir/serial.txt" | grep -v '^\[' || true
  local expected
  for expected in "features: $features" "rows: scalar; $row" passed "status 0"; do
    if ! tr -d '\r' <"$dir/serial.txt" | grep -qxF -- "$expected"; then
      echo "$row on an emulated $model: expected the line '$expected' in $dir/serial.txt" >&2
      exit 1
    fi
  done
}

avx2="avx2, fma3, f16c"
avx512="avx512_f, avx512_bw, avx512_vl, avx512_dq, avx512_vnni"
[ $# -gt 0 ] || set -- avx_vnni amx
for row; do
  case $row in
    avx_vnni) emulate "$row" arrow_lake signed "$avx2, avx_vnni" ;;
    amx)
      emulate "$row" sapphire_rapids unsigned "$avx2, $avx512, avx_vnni, avx512_bf16" \
        tiles.ko="$build/module/tiles.ko"
      ;;
    *)
      echo "expected avx_vnni or amx, got $row" >&2
      exit 1
      ;;
  esac
done
