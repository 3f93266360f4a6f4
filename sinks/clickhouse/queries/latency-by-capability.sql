-- How long steps of each capability take: count, median, 99th percentile and longest, in milliseconds of work
SELECT
    capability,
    count() AS runs,
    round(quantileExact(0.5)(work_ms)) AS p50_ms,
    round(quantileExact(0.99)(work_ms)) AS p99_ms,
    max(work_ms) AS max_ms,
    countIf(status = 'failed') AS failed
FROM steps
WHERE isNotNull(work_ms)
GROUP BY capability
ORDER BY runs DESC, capability
