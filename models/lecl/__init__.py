"""Pretraining driven by lesions: LECL (Ligero, Lenz et al., MICCAI 2025), RadLAS's two tasks, and planted lesions."""
