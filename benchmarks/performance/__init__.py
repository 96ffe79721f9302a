"""The broker beside its peers: the same upstream, the same client, one run, interleaved."""
