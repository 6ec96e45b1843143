# The guest's first process on the machine's root: make it a usable system, run the
# command, hand its exit code to the host, power off.
#
# The ports are virtio-serial ports. The command gets pipes instead of the ports, because a
# port can be open only once, and /dev/stdout must work.
. /run/settings

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
echo podspan-vm >/proc/sys/kernel/hostname
ip link set lo up
ulimit -n 1048576

if [ -n "$FORWARD" ]; then
	# QEMU's user network: the guest is .15, the host .2.
	modprobe virtio_net
	ip link set eth0 up
	ip address add 10.0.2.15/24 dev eth0
	ip route add default via 10.0.2.2
fi

port() {
	local name
	for name in /sys/class/virtio-ports/*/name; do
		if [ "$(<"$name")" = "$1" ]; then
			name=${name%/name}
			echo "/dev/${name##*/}"
		fi
	done
}
out=$(port out) err=$(port err) control=$(port control)
exec {to_host}<>"$control"

mkfifo /run/out /run/err
cat /run/out >"$out" & out_pid=$!
cat /run/err >"$err" & err_pid=$!

cd "$CHECKOUT"
set -m # its own process group, and SIGINT not ignored
bash /run/command </dev/null >/run/out 2>/run/err &
command=$!
set +m
echo started >&"$to_host"

# The host sends one signal name a line.
(while read -r signal <&"$to_host"; do kill -s "$signal" -- "-$command"; done) 2>/dev/null &
listener=$!

wait "$command"
code=$?
kill "$listener"

# What the command left running would keep its output open.
for folder in /proc/[0-9]*; do
	pid=${folder#/proc/}
	case $pid in
	1 | "$out_pid" | "$err_pid") ;;
	*) [ -e "$folder/exe" ] && kill -KILL "$pid" ;;
	esac
done 2>/dev/null
wait "$out_pid" "$err_pid"

sync
echo "exit $code" >&"$to_host"
echo o >/proc/sysrq-trigger
sleep 60
