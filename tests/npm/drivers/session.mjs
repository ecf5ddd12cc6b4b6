// What an application of Node.js does with Postgres, through the proxy. usage: node session.mjs SETTINGS
//
// SETTINGS is a JSON file: host, port, name (the proxy's, with the endpoint in it), endpoint, user, password, database,
// ca. Each step that went well is a line "ok NAME"; the first that does not ends the process with its error.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'

import pg from 'pg'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import Cursor from 'pg-cursor'

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'))
const ca = readFileSync(settings.ca, 'utf8')

function options(changes = {}) {
  const { host, port, user, password, database, name } = settings
  // By address, so that the name below is the one that is asked for and the one that is checked.
  return { host, port, user, password, database, ssl: { ca, servername: name }, ...changes }
}

async function connect(changes) {
  const client = new pg.Client(options(changes))
  await client.connect()
  return client
}

async function refused(changes, code) {
  const client = new pg.Client(options(changes))
  client.on('error', () => {}) // the connection's end, behind the error that we wait for
  await assert.rejects(client.connect(), { code })
}

async function value(client, text, values = []) {
  const { rows } = await client.query({ text, values, rowMode: 'array' })
  return rows[0][0]
}

const fails = (client, query, expected) => assert.rejects(client.query(query), expected)
const hash = (text) => createHash('sha256').update(text).digest('hex')

const steps = {
  async 'wake, TLS and SCRAM'(client) {
    const { stream } = client.connection
    assert.equal(stream.authorized, true)
    assert.equal(stream.getProtocol(), 'TLSv1.3')
    assert.equal(await value(client, 'SELECT current_user::text'), settings.user)
  },

  async 'whom it does not trust'() {
    await refused({ ssl: { ca, servername: 'localhost.example' } }, 'ERR_TLS_CERT_ALTNAME_INVALID')
    await refused({ ssl: { servername: settings.name } }, 'UNABLE_TO_VERIFY_LEAF_SIGNATURE')
    await refused({ ssl: false }, '28000')
    await refused({ password: 'wrong' }, '28P01')
  },

  async 'the endpoint in the options'() {
    const client = await connect({
      ssl: { ca, servername: 'localhost' },
      options: `endpoint=${settings.endpoint} -c statement_timeout=54321`,
    })
    assert.equal(await value(client, 'SHOW statement_timeout'), '54321ms')
    await client.end()
  },

  async 'prepared statements'(client) {
    await client.query('CREATE TEMP TABLE t (a int PRIMARY KEY, b bytea, c jsonb, d timestamptz, e numeric, f text[])')
    const row = [Buffer.from([0, 1, 255]), { deep: [1, null, 'ü'] }, new Date(1e12), '12345678901234567890.5', ['x', null]]
    for (let a = 0; a < 50; a++) {
      await client.query({ name: 'insert', text: 'INSERT INTO t VALUES ($1, $2, $3, $4, $5, $6)', values: [a, ...row] })
    }
    const found = await client.query({ name: 'find', text: 'SELECT b, c, d, e, f FROM t WHERE a = $1', values: [49] })
    assert.deepEqual(Object.values(found.rows[0]), row)
    const names = await client.query("SELECT name, statement LIKE '%$1%' AS whole FROM pg_prepared_statements ORDER BY 1")
    assert.deepEqual(names.rows, [{ name: 'find', whole: true }, { name: 'insert', whole: true }])
    await client.query('DEALLOCATE ALL')
  },

  async 'COPY both ways'(client) {
    await client.query('CREATE TEMP TABLE copied (a int PRIMARY KEY, b text)')
    const lines = Array.from({ length: 100_000 }, (_, a) => `${a}\t${'z'.repeat(a % 100)}\n`)
    await pipeline(Readable.from(lines), client.query(copyFrom('COPY copied FROM STDIN')))
    let taken = ''
    for await (const chunk of client.query(copyTo('COPY (SELECT * FROM copied ORDER BY a) TO STDOUT'))) taken += chunk
    assert.equal(hash(taken), hash(lines.join('')))
    // One row that does not fit takes all of them back, and the session goes on.
    const again = pipeline(Readable.from(['500000\tnew\n', lines[7]]), client.query(copyFrom('COPY copied FROM STDIN')))
    await assert.rejects(again, { code: '23505', constraint: 'copied_pkey' })
    assert.equal(await value(client, 'SELECT count(*)::int FROM copied'), lines.length)
  },

  async 'LISTEN and NOTIFY'(client) {
    const other = await connect()
    const pid = await value(other, 'SELECT pg_backend_pid()') // what it has for a cancel is the proxy's
    await client.query('LISTEN channel')
    const heard = once(client, 'notification')
    await other.query("SELECT pg_notify('channel', 'heard')")
    const [{ channel, payload, processId }] = await heard
    assert.deepEqual([channel, payload, processId], ['channel', 'heard', pid])
    await other.end()
  },

  async 'cursors'(client) {
    const cursor = client.query(new Cursor('SELECT generate_series(1, $1::int) AS n', [2500]))
    const sizes = []
    let sum = 0
    for (let rows; (rows = await cursor.read(1000)).length; ) {
      sizes.push(rows.length)
      sum += rows.reduce((total, { n }) => total + n, 0)
    }
    assert.deepEqual([sizes, sum], [[1000, 1000, 500], (2500 * 2501) / 2])
    await cursor.close()
    const left = client.query(new Cursor('SELECT generate_series(1, 1000000)'))
    await left.read(10)
    await left.close() // with most of it unread
    assert.equal(await value(client, 'SELECT 1'), 1)
  },

  async 'large objects'(client) {
    const content = Buffer.alloc(1_000_003, 'large object ')
    await client.query('BEGIN')
    const oid = await value(client, 'SELECT lo_create(0)')
    const handle = await value(client, 'SELECT lo_open($1, 393216)', [oid]) // INV_WRITE | INV_READ
    for (let at = 0; at < content.length; at += 250_000) {
      await client.query('SELECT lowrite($1, $2)', [handle, content.subarray(at, at + 250_000)])
    }
    await client.query('SELECT lo_lseek($1, 0, 0)', [handle])
    const pieces = []
    for (let piece; (piece = await value(client, 'SELECT loread($1, 300000)', [handle])).length; ) pieces.push(piece)
    await client.query('COMMIT')
    assert.ok(Buffer.concat(pieces).equals(content))
    await client.query('SELECT lo_unlink($1)', [oid])
  },

  async 'cancel'(client) {
    const pid = await value(client, 'SELECT pg_backend_pid()')
    const query = new pg.Query('SELECT pg_sleep(60)')
    const failed = once(query, 'error')
    client.query(query)
    const watcher = await connect()
    const sleeps = 'SELECT count(*)::int FROM pg_stat_activity WHERE pid = $1 AND wait_event = $2'
    while ((await value(watcher, sleeps, [pid, 'PgSleep'])) === 0);
    await watcher.end()
    const canceller = new pg.Client(options())
    canceller.connection.on('error', () => {}) // answered by closing, whatever became of it
    canceller.cancel(client, query)
    assert.equal((await failed)[0].code, '57014')
    assert.equal(await value(client, 'SELECT 1'), 1)
  },

  async 'errors'(client) {
    await fails(client, 'SELECT 1 / 0', { code: '22012', severity: 'ERROR' })
    await fails(client, 'SELECT nothing', { code: '42703', position: '8' })
    await fails(client, 'SELECT FROM WHERE', { code: '42601' })
    await fails(client, 'SELECT * FROM nowhere', { code: '42P01' })
    await fails(client, 'ALTER SYSTEM SET work_mem = 64', { code: '42501' })
    await client.query('CREATE TABLE node_errors (a int CONSTRAINT positive CHECK (a > 0))')
    const where = { schema: 'public', table: 'node_errors', constraint: 'positive' }
    await fails(client, 'INSERT INTO node_errors VALUES (-1)', { code: '23514', ...where })
    await client.query('BEGIN')
    await fails(client, 'SELECT 1 / 0', { code: '22012' })
    await fails(client, 'SELECT 1', { code: '25P02' })
    await client.query('ROLLBACK')
    // Two that want the same row.
    await client.query('INSERT INTO node_errors VALUES (1)')
    const other = await connect()
    await other.query('BEGIN ISOLATION LEVEL REPEATABLE READ')
    await other.query('SELECT * FROM node_errors')
    await client.query('UPDATE node_errors SET a = 2')
    await fails(other, 'UPDATE node_errors SET a = 3', { code: '40001' })
    await other.end()
    await client.query('DROP TABLE node_errors')
  },

  async 'a session that is ended'(client) {
    const other = await connect()
    const told = once(other, 'error')
    other.on('error', () => {}) // and that the connection has ended
    const pid = await value(other, 'SELECT pg_backend_pid()')
    await client.query('SELECT pg_terminate_backend($1)', [pid])
    assert.equal((await told)[0].code, '57P01')
  },

  async 'a pool'() {
    const pool = new pg.Pool(options({ max: 10 }))
    const answers = await Promise.all(
      Array.from({ length: 200 }, (_, n) => pool.query('SELECT $1::int AS n, pg_backend_pid() AS pid', [n])),
    )
    assert.deepEqual(answers.map(({ rows }) => rows[0].n), [...answers.keys()])
    assert.equal(new Set(answers.map(({ rows }) => rows[0].pid)).size, 10)
    await pool.end()
  },
}

const client = await connect()
for (const [name, step] of Object.entries(steps)) {
  await step(client)
  console.log(`ok ${name}`)
}
await client.end()
