"""Files that an adaptation writes beside its checkpoint."""

LABELS_NAME, TO_LABEL_NAME = "labels.json", "to_label.csv"
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
