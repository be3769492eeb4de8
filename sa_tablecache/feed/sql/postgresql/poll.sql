-- One statement, so that all of it is of one moment: 0 where and what we read, 1 changes, 2 tables.
SELECT 0 AS kind, m.version::text AS a, pg_current_snapshot()::text AS b, i.incarnation AS c,
    i.trimmed::text AS d, current_setting('transaction_read_only') AS e, NULL AS f
FROM sa_tablecache.meta AS m LEFT JOIN sa_tablecache.incarnation AS i ON true
UNION ALL
SELECT 1, c.schema, c.name, c.operation, c.keys, c.ranges, c.xid::text
FROM sa_tablecache.since(
    CAST(:incarnation AS text), CAST(CAST(:xmax AS text) AS xid8),
    CAST(CAST(:running AS text) AS xid8[])
) AS c
UNION ALL
SELECT 2, r.schema, r.name, r.fingerprint, r.problem, NULL, NULL
FROM sa_tablecache.inspect(CAST(CAST(:relations AS text) AS jsonb)) AS r
