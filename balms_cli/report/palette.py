"""The colours of the page and its figures, light and dark. Okabe and Ito's hues, told apart by colour-blind readers; markers
and line styles say the same again."""

LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#596069", "line": "#d8dce1", "many": "#0072b2", "medium": "#00805d",
    "few": "#c94f00", "run0": "#3b4048", "run1": "#b87300", "run2": "#9c4884", "run3": "#3a93cf", "run4": "#6b7a1e",
    "run5": "#8c6d5a", "heat": "#0073b3", "ground": "#f6f7f8", "accent": "#00619a", "good": "#00765a", "soft": "#eef3f7",
}  # fmt: skip
DARK = {
    "paper": "#1c1f23", "ink": "#e7e9ec", "muted": "#a4acb6", "line": "#3a3f47", "many": "#5ab4ec", "medium": "#2cc495",
    "few": "#ff8b45", "run0": "#d3d7dd", "run1": "#eaa92f", "run2": "#dd94c5", "run3": "#74c4f5", "run4": "#b9c95c",
    "run5": "#c7a48d", "heat": "#3f9fd8", "ground": "#131518", "accent": "#7cc4f5", "good": "#45d0a4", "soft": "#232930",
}  # fmt: skip
MARKERS = {"many": "o", "medium": "s", "few": "^"}
RUNS = 6  # colours of runs that lie over each other in one figure
RUN_MARKERS = ("o", "s", "^", "D", "v", "P")
RUN_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
