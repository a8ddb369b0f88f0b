// The golden vectors as the app asks, through Picture.kt and a llama-server, one line of JSON each:
//   golden(bundle folder, File("phone.jsonl"))
//   rankwise bundle --replay . --answers phone.jsonl
// Call it off the main thread. Not run by Rankwise on a device.
import android.util.Base64
import java.io.File
import java.net.URL
import org.json.JSONArray
import org.json.JSONObject

fun golden(bundle: File, out: File, server: String = "http://127.0.0.1:8080") {
    val vectors = read(bundle, "golden/golden.json")
    val cases = vectors.getJSONArray("cases")
    val limit = read(bundle, "bundle.json").getInt("max_new_tokens")
    val start = read(bundle, "prompt.json").getJSONObject("start_token")
    val props = JSONObject(URL("$server/props").readText())
    out.writeText("")
    for (number in 0 until cases.length()) {
        val case = cases.getJSONObject(number)
        val pictures = sent(bundle, case.getJSONArray("images"))
        var prompt = case.getString("prompt")
        if (start.getString("put_by") == "the runtime") prompt = prompt.removePrefix(start.getString("text"))
        val body = JSONObject().put("prompt", prompt).put("n_predict", limit).put("temperature", 0)
            .put("repeat_penalty", 1).put("n_probs", vectors.getInt("top")).put("cache_prompt", false)
            .put("return_tokens", true)
        if (pictures.isNotEmpty()) {
            val marked = prompt.replace(case.getString("marker"), props.getString("media_marker"))
            body.put("prompt", JSONObject().put("prompt_string", marked).put("multimodal_data", JSONArray(pictures)))
        }
        val started = System.nanoTime()
        val answer = JSONObject(post("$server/completion", body))
        val ms = (System.nanoTime() - started) / 1e6
        val parts = if (pictures.isEmpty()) listOf(prompt) else prompt.split(case.getString("marker"))
        val texts = parts.mapIndexed { place, part -> tokens(server, part, place == 0) }
        val places = answer.getInt("tokens_evaluated") - texts.sumBy { it.size }
        val each = List(if (pictures.isEmpty()) 0 else places / pictures.size) { -1 } // a picture's, its delimiters too
        val ids = texts.reduce { all, part -> all + each + part }
        val line = JSONObject().put("case", case.getString("id")).put("png", JSONArray(pictures))
            .put("prompt_ids", JSONArray(ids)).put("text", answer.getString("content"))
            .put("top_logprobs", likeliest(answer)).put("ms", ms).put("build", props.getString("build_info"))
        out.appendText("$line\n")
    }
}

/** The app's own pixels of each source, as PNG in base64. */
private fun sent(bundle: File, images: JSONArray): List<String> = List(images.length()) { place ->
    val photo = File(bundle, "golden/" + images.getJSONObject(place).getString("source")).readBytes()
    val picture = png(square(photo, read(bundle, "device.json").getInt("image_size")))
    Base64.encodeToString(picture, Base64.NO_WRAP)
}

private fun tokens(server: String, text: String, first: Boolean): List<Int> {
    val body = JSONObject().put("content", text).put("add_special", first).put("parse_special", true)
    val found = JSONObject(post("$server/tokenize", body)).getJSONArray("tokens")
    return List(found.length()) { found.getInt(it) }
}

/** Ids with their log-probabilities, place by place; null where the server leaves out places (pieces of characters). */
private fun likeliest(answer: JSONObject): JSONArray? {
    val places = answer.optJSONArray("completion_probabilities") ?: return null
    if (places.length() != answer.getJSONArray("tokens").length()) return null
    return JSONArray(List(places.length()) { place ->
        val top = places.getJSONObject(place).getJSONArray("top_logprobs")
        JSONArray(List(top.length()) { rank ->
            val one = top.getJSONObject(rank)
            JSONArray(listOf(one.getInt("id"), maxOf(one.getDouble("logprob"), -104.0)))
        })
    })
}

private fun read(bundle: File, name: String) = JSONObject(File(bundle, name).readText())
