"""The test ground: real guests under a real libvirtd, private to one test run.

`libvirtd` runs the daemon, `ingredients` makes what a guest boots from, `guest` defines and drives guests,
`images` looks into their disk images from outside. Nothing here knows the program under test, so what a test
asserts with it is libvirt's and QEMU's word, not ours.
"""
