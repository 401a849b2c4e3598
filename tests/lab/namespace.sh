#!/bin/sh
# Process 1 of a private libvirtd's namespaces: makes the mounts, says "ready", then waits until its stdin ends.
# usage: namespace.sh DIRECTORY ROOT UNPACKED SHARED...       (see libvirtd.py, which starts it)
set -eu
directory=$1 root=${2%/} unpacked=$3
shift 3

bind() {
    mkdir -p "$1" "$2"
    mount --bind "$1" "$2"
}

# By the old system call: in the new one, which Debian 13 uses, an option has room for 256 bytes only.
overlay() {
    LIBMOUNT_FORCE_MOUNT2=always mount -t overlay -o "$1" overlay "$2"
}

# Another root stays as it is, since others may use it too: what is written in it goes to memory. What it shares with
# ours has the same path in both.
if [ -n "$root" ]; then
    changes=$directory/changes
    mkdir -p "$changes"
    mount -t tmpfs changes "$changes"
    mkdir "$changes/upper" "$changes/work"
    overlay "lowerdir=$root,upperdir=$changes/upper,workdir=$changes/work" "$root"
    for path in "$directory" "$@"; do bind "$path" "$root$path"; done
    mount --rbind /sys "$root/sys"
fi

# A libvirtd that is only unpacked, as if it were installed.
if [ -n "$unpacked" ]; then overlay "lowerdir=$unpacked:$root/usr" "$root/usr"; fi

rm -rf "$directory/run" # new namespaces are a host that has just booted
bind "$directory/etc" "$root/etc/libvirt"
bind "$directory/run" "$root/run/libvirt"
for kind in lib cache log; do bind "$directory/$kind" "$root/var/$kind/libvirt"; done

# Locks of consoles are named after pseudo terminals, of which each libvirtd here has a first one.
mkdir -p "$root/run/lock"
mount -t tmpfs lock "$root/run/lock"

# The daemon insists on the user it was compiled with, whatever qemu.conf says.
for names in passwd group; do
    cp "$root/etc/$names" "$directory/$names"
    grep -q ^libvirt-qemu: "$directory/$names" || echo 'libvirt-qemu:x:64055:64055::/:' >>"$directory/$names"
    mount --bind "$directory/$names" "$root/etc/$names"
done

dev=$directory/dev
mkdir -p "$dev"
mount -t tmpfs -o mode=755 dev "$dev"
for node in null zero full random urandom tty; do
    touch "$dev/$node"
    mount --bind "/dev/$node" "$dev/$node"
done
mkdir "$dev/pts" "$dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 pts "$dev/pts"
ln -s pts/ptmx "$dev/ptmx"
mount -t tmpfs shm "$dev/shm"
mount --move "$dev" "$root/dev"
mount -t proc proc "$root/proc"

echo ready
exec env --ignore-signal=CHLD cat # ignored: the kernel then reaps the orphans that are given to process 1
