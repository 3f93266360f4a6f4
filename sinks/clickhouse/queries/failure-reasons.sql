-- Why tasks and steps failed, most frequent reason first
SELECT what, reason, count() AS times, max(at) AS last_at
FROM
(
    SELECT 'task' AS what, reason, finished_at AS at FROM tasks WHERE status IN ('failed', 'expired', 'cancelled')
    UNION ALL
    SELECT 'step' AS what, reason, coalesce(assessed_at, completed_at, assigned_at) AS at
    FROM steps WHERE status IN ('failed', 'rejected', 'sent back')
    UNION ALL
    SELECT 'dead letter' AS what, concat(error_type, ': ', error) AS reason, toNullable(at) AS at FROM dead_letters
)
GROUP BY what, reason
ORDER BY times DESC, what, reason
LIMIT 50
