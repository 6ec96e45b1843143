#!/bin/bash
# Install the Debian packages of packages.txt that are missing. Takes no time and needs
# no root when none is. Used by the Makefile on any Debian 12, and by the Vagrantfile.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
policy=/usr/sbin/policy-rc.d

wanted() { sed 's/#.*//' "$here/packages.txt"; }

missing() {
	local package
	for package in $(wanted); do
		dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null |
			grep -qx installed || echo "$package"
	done
}

# Debian starts a service when its package is installed, unless this script says no.
keep_services_down() {
	[ ! -e "$policy" ] || return 0
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
}

if ! command -v apt-get >/dev/null; then
	echo "podspan: this is not Debian: no apt-get" >&2
	echo "hint: on another system use Vagrant, see README.md" >&2
	exit 1
fi

mapfile -t packages < <(missing)
[ "${#packages[@]}" -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "podspan: need root to install: ${packages[*]}" >&2
	echo "hint: sudo vagrant/provision.sh, or run make as root" >&2
	exit 1
fi

echo "podspan: installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
keep_services_down
apt-get -qq -o DPkg::Lock::Timeout=300 update
apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 \
	-o Dpkg::Use-Pty=0 install "${packages[@]}" </dev/null

# Nor on the next boot, where there is an init system.
case " ${packages[*]} " in
*" nginx-light "*) if [ -d /run/systemd/system ]; then systemctl disable -q nginx; fi ;;
esac
