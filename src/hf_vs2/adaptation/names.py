"""Files that an adaptation writes beside its checkpoint."""

LABELS_NAME, TEMPLATES_NAME, TO_LABEL_NAME = "labels.json", "templates.json", "to_label.csv"
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
