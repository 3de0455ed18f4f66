"""What several services need: formats, errors, configuration, and the frame of a gRPC server."""
