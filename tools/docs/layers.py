"""The rooms of the package, lowest first: a room imports only itself and lower layers. Tests keep it, README shows it."""

LAYERS = [
    {"_version", "errors", "escapes"},
    {"progress"},
    {"files", "texts"},
    {"quantization"},
    {"kernels", "ranks"},
    {"model"},
    {"checkpoint", "decode"},
    {"compression", "measure"},
    {"studies"},
    {"report"},
    {"demo"},
    {"cli"},
]
