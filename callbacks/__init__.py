"""What cuts across papers: Lightning callbacks that work in any project."""
