"""Files: safetensors shards, folders that appear whole or not at all, locks, hashed and sealed files."""
