"""File formats and access: safetensors shards, atomic folders, folder locks, hashed and sealed files."""
