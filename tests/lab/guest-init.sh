#!/bin/busybox sh
# shellcheck shell=dash
# Process 1 of a test guest. Options on the kernel's command line: "agent" starts the guest agent, "writer" a process
# that keeps writing to the disk. Prints GUEST-UP once everything is there, then a BEAT five times a second: the proof,
# readable from outside, that the guest runs. A first disk with a file system is mounted on /mnt, never formatted here:
# that would destroy the state that a restore has just brought back.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -s /proc/mounts /etc/mtab # where the agent looks for what to freeze
options=" $(cat /proc/cmdline) "

while read -r module; do insmod "/modules/$module"; done </modules/order

for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -b /dev/vda ] && break
    usleep 50000
done
mount -t ext4 /dev/vda /mnt || echo GUEST-FAILED: cannot mount /dev/vda

case "$options" in *" agent "*)
    mkdir /dev/virtio-ports # no udev here: make by hand the names that the agent looks for
    for port in /sys/class/virtio-ports/*; do
        ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
    done
    qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -l /run/qemu-ga.log &
    ;;
esac

echo "GUEST-UP after $(cut -d' ' -f1 /proc/uptime) s"

case "$options" in *" writer "*)
    (
        count=0
        while :; do
            dd if=/dev/urandom of="/mnt/written.$((count % 64))" bs=64k count=1 conv=fsync 2>/dev/null
            count=$((count + 1))
            usleep 50000
        done
    ) &
    ;;
esac

count=0
while :; do
    count=$((count + 1))
    echo "BEAT $count"
    usleep 200000
done
