// The example's Next.js route, unchanged, between a browser's request and the gateway; prints what came out.
import { POST } from './example/route.ts'
import { tell } from './gateway.mjs'

const body = JSON.stringify({ message: 'hi' })
const response = await POST(new Request('http://next/api/chat', { method: 'POST', body }))
const text = await response.text()
const events = text.split('\n\n').filter(Boolean).map((line) => JSON.parse(line.slice('data: '.length)))
tell({ type: response.headers.get('content-type'), events })
