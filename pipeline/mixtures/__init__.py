"""From shards to mixtures: anchors and their mining, pairs, mixing, tracks, mixtures of mixtures."""
