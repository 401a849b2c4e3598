"""The metrics over HTTP: h11 speaks the protocol; the limits on clients that are idle, slow or many are ours."""
