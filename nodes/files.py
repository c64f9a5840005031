"""Files of a workflow, restricted to the host's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def inside(file: str) -> Path | None:
    """The path of a file of the input or output folder ("name" or "name [output]"); None for any other."""
    try:
        path = Path(folder_paths.get_annotated_filepath(file)).resolve()
    except ValueError:  # newer hosts reject paths outside their folder
        return None
    roots = (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    allowed = any(path.is_relative_to(Path(root).resolve()) for root in roots)
    return path if allowed and path.is_file() else None
