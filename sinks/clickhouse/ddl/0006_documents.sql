-- A row for each document that was submitted or indexed, as its latest events leave it.
CREATE OR REPLACE VIEW documents AS
SELECT
    key AS document,
    argMaxIf(JSONExtractString(payload, 'title'), timestamp, type = 'magnatronic.documents.DocumentSubmitted') AS title,
    argMaxIf(JSONExtractString(payload, 'source'), timestamp, type = 'magnatronic.documents.DocumentSubmitted') AS source,
    argMaxIf(splitByChar('.', type)[-1], (timestamp, offset), type != 'magnatronic.documents.DocumentIndexed')
        = 'DocumentRemoved' AS removed,
    argMaxIf(JSONLength(payload, 'chunk_ids'), (timestamp, offset), type = 'magnatronic.documents.DocumentIndexed') AS chunks,
    maxOrNullIf(timestamp, type = 'magnatronic.documents.DocumentSubmitted') AS submitted_at,
    maxOrNullIf(timestamp, type = 'magnatronic.documents.DocumentIndexed') AS indexed_at
FROM event_log FINAL
PREWHERE type IN (
    'magnatronic.documents.DocumentSubmitted', 'magnatronic.documents.DocumentRemoved',
    'magnatronic.documents.DocumentIndexed')
GROUP BY key;
