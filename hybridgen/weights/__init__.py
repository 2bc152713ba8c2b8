"""Official weights in and out. The only package that opens pickles: what runs or samples reads safetensors or Orbax."""
