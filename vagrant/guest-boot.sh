#!/bin/sh
# The guest's first process, in the initramfs (busybox): mount the machine's root.
#
# The whole root is an overlay whose upper layer is memory, so a guest changes nothing
# on the machine but the checkout, which is mounted writable on top.
#
# cache=loose: file contents and names are kept, not asked for again. The machine and the
# guest must not write the same file at the same time; in return Python starts many
# times faster, because under emulation every 9p message costs.
set -e
fail() { echo "vm: $*" >/dev/console; poweroff -f; }
trap 'fail "cannot mount the machine\047s root file system"' EXIT

mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do
	insmod "$module" || fail "cannot load $module"
done

. /settings
mount -t tmpfs -o mode=0755 state /state
mkdir /state/machine /state/upper /state/work /state/root
mount -t 9p -o version=9p2000.L,trans=virtio,msize=512000,cache=loose machine /state/machine
mount -t overlay -o lowerdir=/state/machine,upperdir=/state/upper,workdir=/state/work \
	root /state/root

# Before the checkout, which may lie in one of them.
mount -t tmpfs -o mode=0755 run /state/root/run
mount -t tmpfs -o mode=1777 tmp /state/root/tmp
mkdir -p "/state/root$CHECKOUT"
mount --bind "/state/machine$CHECKOUT" "/state/root$CHECKOUT"

# The package's modules, where modprobe looks for them.
mkdir -p /state/root/lib/modules
mount -t tmpfs modules /state/root/lib/modules
mkdir "/state/root/lib/modules/$VERSION"
mount --bind "/state/machine$MODULES" "/state/root/lib/modules/$VERSION"

cp /settings /command /guest-run.sh /state/root/run/
umount /proc /dev
trap - EXIT
exec switch_root /state/root /bin/bash /run/guest-run.sh
