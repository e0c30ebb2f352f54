"""What ranks run (lib.ranks): DTensors against the whole tensor. Each function runs on every rank."""
