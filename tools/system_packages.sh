#!/usr/bin/env bash
# Installs the system packages that are missing, with apt-get on Debian and Ubuntu; elsewhere it says what is needed.
#   tools/system_packages.sh run     what compiling and training needs
#   tools/system_packages.sh test    what the whole test suite needs as well
# Packages for `run` must be had; without those for `test`, the tests that need them skip and say so.
set -euo pipefail

group=${1:?run or test}

# package=program it is for ("-": a library, asked for by package name)
wanted=(g++=g++ make=make python3-venv=-)
if [ "$group" = test ]; then
  wanted+=(clang=clang++ qemu-user=qemu-aarch64 mesa-vulkan-drivers=- libvulkan1=- chromium=chromium)
  [ "$(uname -m)" = aarch64 ] || wanted+=(g++-aarch64-linux-gnu=aarch64-linux-gnu-g++)
  if ! command -v google-chrome >/dev/null && ! grep -q '^ID=ubuntu' /etc/os-release 2>/dev/null; then
    wanted+=(chromium=chromium) # Ubuntu has it as a snap only
  fi
  case "$(node --version 2>/dev/null)" in
    v2[4-9]* | v[3-9]?*) ;;
    *) wanted+=(npm=npm) ;;
  esac
fi

debian() { command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; }

has() { # package program
  if [ "$2" != - ] && command -v "$2" >/dev/null; then return 0; fi
  if [ "$1" = clang ] && compgen -c clang++- >/dev/null; then return 0; fi
  if [ "$1" = chromium ] && command -v "${CHROMIUM:-chromium-browser}" google-chrome >/dev/null; then return 0; fi
  if [ "$1" = python3-venv ]; then "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null; return; fi
  debian && dpkg-query --show --showformat='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'
}

missing=()
for entry in "${wanted[@]}"; do
  has "${entry%%=*}" "${entry#*=}" || missing+=("${entry%%=*}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

refuse() { # what to do
  echo "missing: ${missing[*]}. $1" >&2
  [ "$group" = test ] || exit 1
  echo "Going on: tests that need them skip, with the reason." >&2
  exit 0
}

if ! debian; then
  refuse "These are Debian's names; install what your system calls them."
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || refuse "Ask an administrator to run: apt-get install ${missing[*]}"
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -q || echo "apt-get update failed; trying with the lists there are" >&2
known=()
for package in "${missing[@]}"; do
  # Ubuntu has no chromium but as a snap. One unknown name would keep apt-get from installing the others.
  if [ -n "$(apt-cache madison "$package" 2>/dev/null)" ]; then known+=("$package"); fi
done
if [ ${#known[@]} -gt 0 ]; then
  echo "installing ${known[*]}"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${known[@]}" \
    || refuse "apt-get could not install them; see above."
fi
[ ${#known[@]} -eq ${#missing[@]} ] || refuse "apt-get knows only: ${known[*]:-none}."
