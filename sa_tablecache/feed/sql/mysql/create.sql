-- The changelog of MariaDB 10.6 and MySQL 8. A blank line ends a statement: there is none inside one.
-- No statement has a percent sign or a bind parameter: drivers and templates leave the text alone.
-- Who reads needs, in this database:  GRANT SELECT, INSERT, DELETE ON sa_tablecache_changelog
--                                     GRANT SELECT, UPDATE ON sa_tablecache_meta
--                                     GRANT SELECT ON sa_tablecache_watched
-- and GRANT TRIGGER on the watched tables and those that cascade into them, and GRANT PROCESS ON *.*
-- Who writes watched tables needs nothing: the triggers have the rights of who watched them.
-- trimmed: all entries up to it are deleted. position: where somebody stood lately, with that last id.
CREATE TABLE IF NOT EXISTS sa_tablecache_meta (
    one TINYINT NOT NULL PRIMARY KEY,
    version INT NOT NULL,
    incarnation VARCHAR(32) NOT NULL,
    trimmed BIGINT UNSIGNED NOT NULL,
    last BIGINT UNSIGNED NOT NULL,
    position LONGTEXT
) ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin

-- One row for each row that was written. operation: I, U, D; T: any row of the table; X: nothing, the
-- id is taken so that nobody will have it. changed: [[key, ...], ...], NULL for any row;
-- bounds: an object with an array of values for each column of ranges. writer: its connection.
CREATE TABLE IF NOT EXISTS sa_tablecache_changelog (
    id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    at DATETIME NOT NULL,
    writer BIGINT UNSIGNED NOT NULL,
    table_schema VARCHAR(64) NOT NULL,
    table_name VARCHAR(64) NOT NULL,
    operation CHAR(1) NOT NULL,
    changed LONGTEXT,
    bounds LONGTEXT
) ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin

-- table_schema: empty for the database of the changelog.
CREATE TABLE IF NOT EXISTS sa_tablecache_watched (
    table_schema VARCHAR(64) NOT NULL,
    table_name VARCHAR(64) NOT NULL,
    definition LONGTEXT NOT NULL,
    PRIMARY KEY (table_schema, table_name)
) ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin

INSERT INTO sa_tablecache_meta (one, version, incarnation, trimmed, last)
SELECT 1, {version}, LEFT(MD5(CONCAT(UUID(), RAND())), 12), 0, 0 FROM (SELECT 1 AS one) AS row_one
WHERE NOT EXISTS (SELECT 1 FROM sa_tablecache_meta)

UPDATE sa_tablecache_meta SET version = {version} WHERE version < {version}
