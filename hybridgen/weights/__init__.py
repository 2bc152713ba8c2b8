"""Import and export of official weights. Only this package opens pickles; all others read safetensors or Orbax."""
