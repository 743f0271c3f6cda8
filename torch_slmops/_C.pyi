# The extension module is empty to Python: loading it registers torch.ops.slmops.
