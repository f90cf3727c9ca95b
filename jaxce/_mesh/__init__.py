"""How the arrays of a call lie on a mesh, and what its devices send each other. Nothing else names a mesh."""
