CREATE TABLE IF NOT EXISTS {schema}.sa_tablecache_meta (name TEXT PRIMARY KEY, value)

INSERT OR IGNORE INTO {schema}.sa_tablecache_meta
VALUES ('version', {version}), ('incarnation', lower(hex(randomblob(6))))

CREATE TABLE IF NOT EXISTS {schema}.sa_tablecache_changelog (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    relation TEXT,
    operation TEXT,
    keys TEXT,
    bounds TEXT,
    at INTEGER DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER))
)

CREATE TABLE IF NOT EXISTS {schema}.sa_tablecache_watched (
    name TEXT PRIMARY KEY COLLATE NOCASE,
    watch TEXT
)

INSERT INTO {schema}.sa_tablecache_changelog (operation)
SELECT 'B' WHERE NOT EXISTS (SELECT 1 FROM {schema}.sa_tablecache_changelog)
